"""Fast paths, one file a backend and op. Importing this attaches each to its reference in `anybatch.methods`."""

from anybatch.kernels import recompute_group_norm as recompute_group_norm
from anybatch.kernels import torch_group_norm as torch_group_norm
from anybatch.kernels import torch_weight_standardize as torch_weight_standardize
