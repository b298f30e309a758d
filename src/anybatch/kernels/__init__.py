"""Fast paths, one file a backend and op. Importing this attaches each to its reference in `anybatch.methods`."""

from anybatch.kernels import channel_moments as channel_moments
from anybatch.kernels import library_kn_conv as library_kn_conv
from anybatch.kernels import native_channel_norm as native_channel_norm
from anybatch.kernels import native_clipping as native_clipping
from anybatch.kernels import native_filter_response_norm as native_filter_response_norm
from anybatch.kernels import native_filters as native_filters
from anybatch.kernels import native_kn_conv as native_kn_conv
from anybatch.kernels import native_local_context_norm as native_local_context_norm
from anybatch.kernels import native_positional_norm as native_positional_norm
from anybatch.kernels import pixel_moments as pixel_moments
from anybatch.kernels import recompute
from anybatch.kernels import torch_batch_renorm as torch_batch_renorm
from anybatch.kernels import torch_group_norm as torch_group_norm
from anybatch.kernels import torch_weight_standardize as torch_weight_standardize
from anybatch.kernels import triton_channel_moments as triton_channel_moments
from anybatch.kernels import triton_channel_norm as triton_channel_norm
from anybatch.kernels import triton_clipping as triton_clipping
from anybatch.kernels import triton_kn_conv as triton_kn_conv
from anybatch.kernels import triton_local_context_norm as triton_local_context_norm
from anybatch.kernels import triton_positional_norm as triton_positional_norm
from anybatch.kernels import triton_weight_standardize as triton_weight_standardize
from anybatch.kernels.local_windows import refused_compiled
from anybatch.methods.batch_channel_norm import batch_channel_norm
from anybatch.methods.batch_norm import frozen_batch_norm
from anybatch.methods.batch_renorm import batch_renorm
from anybatch.methods.derf import dynamic_erf
from anybatch.methods.dynamic_tanh import dynamic_tanh
from anybatch.methods.evo_norm import batch_variance, evo_norm_b0, evo_norm_s0
from anybatch.methods.filter_response_norm import filter_response_norm
from anybatch.methods.group_norm import group_norm
from anybatch.methods.kernel_norm import kernel_norm
from anybatch.methods.kn_conv import kn_conv
from anybatch.methods.local_context_norm import local_context_norm
from anybatch.methods.local_response_norm import local_response_norm
from anybatch.methods.positional_norm import positional_moments, positional_norm

# Ops of which half precision keeps no float32 copies for backward.
recompute.attach(batch_channel_norm)
recompute.attach(batch_renorm)
recompute.attach(batch_variance)
recompute.attach(dynamic_erf)
recompute.attach(dynamic_tanh)
recompute.attach(evo_norm_b0)
recompute.attach(evo_norm_s0)
recompute.attach(filter_response_norm)
recompute.attach(group_norm)
recompute.attach(kernel_norm, asks_for_strides=True)
recompute.attach(kn_conv)
recompute.attach(local_context_norm, refused=refused_compiled)
recompute.attach(local_response_norm)
recompute.attach(positional_moments)
recompute.attach(positional_norm)
recompute.attach(frozen_batch_norm, linear=True)
