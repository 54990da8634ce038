"""Training and evaluation of image classifiers: any model of timm, AttNet above all."""
