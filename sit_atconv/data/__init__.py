"""Images, their codecs to and from latents, and the deterministic order in which training sees them."""

DEFAULT_VAE = "stabilityai/sd-vae-ft-ema"
MAX_MEGAPIXELS = 179.0  # of an image file that is read: Pillow's limit against files that unpack to more than memory
