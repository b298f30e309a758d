"""Networks ready for Opacus' own engine: nothing in place, and rules for the layers it cannot differentiate.

`anybatch.private` needs none of this. It is for programs that wrap a network in ``opacus.GradSampleModule`` or give it
to ``opacus.PrivacyEngine``, which take each sample's gradient layer by layer from what a layer took and the gradient
of what it gave. Layers that take one tensor and draw nothing need no rule of ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from anybatch.methods.fixup import FixupJoin
from anybatch.methods.kernel_norm import dropout, dropout_mask, unit_moments
from anybatch.methods.kn_conv import KNConv1d, KNConv2d, KNConv3d, kn_conv
from anybatch.methods.normalizer_free import NormalizerFreeJoin
from anybatch.methods.skip_init import SkipInitJoin
from anybatch.methods.windows import pad, windows

_KN_CONVS = (KNConv1d, KNConv2d, KNConv3d)
_JOINS = (SkipInitJoin, NormalizerFreeJoin, FixupJoin)


def prepare_for_opacus(model: nn.Module) -> nn.Module:
    """Make a network that treats samples apart one that Opacus takes, in place, and tell Opacus our rules.

    Activations give new tensors, and each KNConv that drops out remembers the seeds that it draws in training until
    Opacus asks for its gradients. Values, parameters, names and what is drawn stay the same. Once is enough, in front
    of ``GradSampleModule`` or ``PrivacyEngine.make_private``.

    Args:
        model: Any network, of ours or with our layers. Sums in place in a network's own ``forward``, such as
            torchvision's ``out += identity``, are out of reach here.

    Returns:
        The same model.

    Raises:
        ImportError: If Opacus is not installed.
    """
    from opacus.grad_sample import register_grad_sampler

    register_grad_sampler(list(_KN_CONVS))(kn_conv_gradients)
    register_grad_sampler(list(_JOINS))(join_gradients)
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # pyright: ignore[reportArgumentType]
        if isinstance(module, _KN_CONVS) and not hasattr(module, "drawn_seeds"):
            module.drawn_seeds = []  # pyright: ignore[reportArgumentType]
            module.register_forward_pre_hook(_remember_seed)
    return model


def _remember_seed(layer: Any, inputs: tuple[Tensor, ...]) -> None:
    """Look ahead at the seed that the layer is about to draw."""
    if not (layer.training and layer.p and torch.is_grad_enabled() and layer.weight.requires_grad):
        return
    x = inputs[0]
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        layer.drawn_seeds.append(dropout(x, layer.p, layer.eval_stats, layer.training)["seed"])


def kn_conv_gradients(layer: Any, activations: list[Tensor], gradient: Tensor) -> dict[nn.Parameter, Tensor]:
    """Each sample's gradients of a KNConv's filters and biases, in closed form.

    With h the gradient times 1 / sqrt(var u' + eps), sample by sample: ``d W_o = sum of h_o (u - mean u')`` over
    positions, of which the second term is one number for a filter, and ``d b_o = sum of g_o``.

    Args:
        layer: Prepared by `prepare_for_opacus` if it drops out.
        activations: What it took: (N, C, *), and the skip connection where it adds one.
        gradient: (N, O, *), of what it gave.

    Returns:
        For each trained parameter (N, *shape).

    Raises:
        ValueError: If the layer drops out in training and did not remember its seed.
    """
    x, residual = activations[0], activations[1] if len(activations) > 1 else None
    n, groups = len(x), layer.groups
    drawn: dict[str, Any] = {"p": layer.p if layer.eval_stats == "expected" else 0.0, "seed": None}
    if layer.training and layer.p:
        if not getattr(layer, "drawn_seeds", None):
            raise ValueError(
                "a KNConv that drops out is differentiated for each sample with the mask it drew, which it did not "
                "remember; call anybatch.per_sample.prepare_for_opacus(model) before wrapping the model"
            )
        drawn = {"p": layer.p, "seed": layer.drawn_seeds.pop()}
    at = windows(layer.dims, layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.padding_mode)
    if layer.activation == "relu":
        given = kn_conv(
            x,
            layer.weight.detach(),
            None if layer.bias is None else layer.bias.detach(),
            layer.stride,
            layer.padding,
            layer.dilation,
            groups,
            padding_mode=layer.padding_mode,
            norm_groups=layer.norm_groups,
            eps=layer.eps,
            residual=residual,
            **drawn,
        )
        gradient = gradient * (given > 0)
    mask = None if drawn["seed"] is None else dropout_mask(x, layer.p, drawn["seed"])
    mean, var = unit_moments(x, layer.norm_groups, at, drawn["p"], mask)
    scale = torch.rsqrt(var + layer.eps)
    h = (gradient.unflatten(1, (layer.norm_groups, -1)) * scale.unsqueeze(2)).to(gradient.dtype)
    found: dict[nn.Parameter, Tensor] = {}
    if layer.weight.requires_grad:
        shift = (h * mean.unsqueeze(2)).flatten(3).sum(3).flatten(1)
        taken = _filter_gradients(pad(x, at), h.flatten(1, 2), layer)
        found[layer.weight] = taken - shift.reshape(n, -1, *(1 for _ in layer.weight.shape[1:]))
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = gradient.flatten(2).sum(2)
    return found


def _filter_gradients(x: Tensor, h: Tensor, layer: Any) -> Tensor:
    """(N, *filters): each sample's gradient of a convolution's filters, as one convolution in N times the groups."""
    n, shape = len(x), layer.weight.shape
    filters = h.new_empty(()).expand(n * shape[0], *shape[1:])
    geometry = (layer.stride, [0] * layer.dims, layer.dilation, False, [0] * layer.dims, n * layer.groups)
    x, h = x.reshape(1, -1, *x.shape[2:]), h.reshape(1, -1, *h.shape[2:])
    backward = torch.ops.aten.convolution_backward
    return backward(h, x, filters, None, *geometry, (False, True, False))[1].unflatten(0, (n, -1))


class _WithoutHooks(nn.Module):
    """A layer whose forward is Opacus' business no more."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.layer.forward(*inputs)


def join_gradients(join: Any, activations: list[Tensor], gradient: Tensor) -> dict[nn.Parameter, Tensor]:
    """Each sample's gradients of the numbers that a join learns, by ``torch.func``.

    Args:
        join: Of `Join`.
        activations: The branch and the skip connection.
        gradient: Of their join.

    Returns:
        For each trained parameter (N, *shape).

    Raises:
        ValueError: If it drops branches in training, which ones cannot be known here.
    """
    if join.training and join.drop is not None:
        raise ValueError(
            "a join that learns numbers and has stochastic depth cannot be differentiated for each sample by Opacus; "
            "build the network with drop_path_rate=0"
        )
    bare = _WithoutHooks(join)
    named = {name: p for name, p in bare.named_parameters() if p.requires_grad}

    def along(parameters: dict[str, Tensor], branch: Tensor, skip: Tensor, g: Tensor) -> Tensor:
        joined = functional_call(bare, parameters, (branch.unsqueeze(0), skip.unsqueeze(0)))
        return (joined * g.unsqueeze(0)).sum()

    values = {name: p.detach() for name, p in named.items()}
    branch, skip = activations
    taken = vmap(grad(along), in_dims=(None, 0, 0, 0))(values, branch, skip, gradient)
    return {named[name]: g for name, g in taken.items()}
