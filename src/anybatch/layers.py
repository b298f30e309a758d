"""Layers for networks of your own; argument names and order are torch's, channels come first."""

from anybatch import kernels as kernels
from anybatch.methods.activation_gain import ScaledActivation as ScaledActivation
from anybatch.methods.filters import reuse_filters as reuse_filters
from anybatch.methods.group_norm import GroupNorm as GroupNorm
from anybatch.methods.scaled_weight_standardization import ScaledWSConv1d as ScaledWSConv1d
from anybatch.methods.scaled_weight_standardization import ScaledWSConv2d as ScaledWSConv2d
from anybatch.methods.scaled_weight_standardization import ScaledWSConv3d as ScaledWSConv3d
from anybatch.methods.scaled_weight_standardization import ScaledWSLinear as ScaledWSLinear
from anybatch.methods.weight_standardization import WSConv1d as WSConv1d
from anybatch.methods.weight_standardization import WSConv2d as WSConv2d
from anybatch.methods.weight_standardization import WSConv3d as WSConv3d
from anybatch.methods.weight_standardization import WSConvTranspose1d as WSConvTranspose1d
from anybatch.methods.weight_standardization import WSConvTranspose2d as WSConvTranspose2d
from anybatch.methods.weight_standardization import WSConvTranspose3d as WSConvTranspose3d
from anybatch.methods.weight_standardization import WSLinear as WSLinear
