"""From any source to calibration windows (N, L) of tokens. Knows no layers."""
