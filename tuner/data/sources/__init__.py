"""Where samples come from: folders, sets of the Hub and of `datasets`, tars; all opened by `open_spec`."""

from __future__ import annotations

from tuner.data.sources.present import PICTURES, Sample, open_source

__all__ = ["PICTURES", "Sample", "open_source"]
