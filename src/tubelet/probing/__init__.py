"""Read-outs of frozen encoders: attentive and linear heads, and floors without a network."""
