"""CapsFusion at scale: fuse a raw and a synthetic caption of every image, lose none."""

__version__ = "0.1.0"
