"""Images, their codecs to and from latents, and the deterministic order in which training sees them."""

DEFAULT_VAE = "stabilityai/sd-vae-ft-ema"
