"""The two kinds of tower: frozen text encoders and trainable image encoders."""
