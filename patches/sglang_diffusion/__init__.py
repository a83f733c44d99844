"""SGLang Diffusion, which is the package ``sglang.multimodal_gen``."""
