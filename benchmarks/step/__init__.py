"""The fused step by itself, against a copy, torch.compile, PyTorch and diffusers."""
