"""Read-outs of frozen encoders: attentive and linear heads, and non-learned baselines."""
