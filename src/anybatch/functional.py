"""The functions behind the layers: references with the fast paths attached."""

from anybatch import kernels as kernels
from anybatch.dispatch import backend as backend
from anybatch.dispatch import backends as backends
from anybatch.methods.activation_gain import activation_gain as activation_gain
from anybatch.methods.batch_channel_norm import batch_channel_norm as batch_channel_norm
from anybatch.methods.batch_norm import frozen_batch_norm as frozen_batch_norm
from anybatch.methods.batch_renorm import batch_renorm as batch_renorm
from anybatch.methods.batch_renorm import renorm_correction as renorm_correction
from anybatch.methods.derf import dynamic_erf as dynamic_erf
from anybatch.methods.dynamic_tanh import dynamic_tanh as dynamic_tanh
from anybatch.methods.evo_norm import batch_variance as batch_variance
from anybatch.methods.evo_norm import evo_norm_b0 as evo_norm_b0
from anybatch.methods.evo_norm import evo_norm_s0 as evo_norm_s0
from anybatch.methods.filter_response_norm import filter_response_norm as filter_response_norm
from anybatch.methods.group_norm import group_norm as group_norm
from anybatch.methods.kernel_norm import kernel_norm as kernel_norm
from anybatch.methods.kn_conv import kn_conv as kn_conv
from anybatch.methods.local_context_norm import local_context_norm as local_context_norm
from anybatch.methods.local_response_norm import local_response_norm as local_response_norm
from anybatch.methods.positional_norm import moment_shortcut as moment_shortcut
from anybatch.methods.positional_norm import positional_moments as positional_moments
from anybatch.methods.positional_norm import positional_norm as positional_norm
from anybatch.methods.scaled_weight_standardization import scaled_weight_standardize as scaled_weight_standardize
from anybatch.methods.stochastic_depth import stochastic_depth as stochastic_depth
from anybatch.methods.weight_standardization import weight_standardize as weight_standardize
