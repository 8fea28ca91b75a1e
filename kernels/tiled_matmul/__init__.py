"""The frame that the Triton matmuls of all formats share: the grid, the segments, the epilogue."""
