"""The functions behind the layers: references with the fast paths attached."""

from anybatch import kernels as kernels
from anybatch.dispatch import backend as backend
from anybatch.dispatch import backends as backends
from anybatch.methods.activation_gain import activation_gain as activation_gain
from anybatch.methods.group_norm import group_norm as group_norm
from anybatch.methods.scaled_weight_standardization import scaled_weight_standardize as scaled_weight_standardize
from anybatch.methods.weight_standardization import weight_standardize as weight_standardize
