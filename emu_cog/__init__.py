"""Emu3.5 as a Cog predictor and as a library."""
