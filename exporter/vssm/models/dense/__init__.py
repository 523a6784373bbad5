"""Dense prediction: backbones that give maps, their necks, and the heads that read them."""
