"""Recipe-driven fine-tuning of Stable-Diffusion-type models."""

from __future__ import annotations

__version__ = "0.1.0"
