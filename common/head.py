"""The output layer: log-probabilities of given tokens from the last hidden states, in chunks.

All logits at once, (M, V), would take more memory than the rest of the model. So the output layer
is applied to CHUNK tokens at a time, forward and backward, and no chunk's logits are kept.
"""

import torch
from torch import Tensor

CHUNK = 1024  # tokens


def token_log_probs(
    lm, hidden: Tensor, targets: Tensor, temperature: float, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (M,) of tokens, and entropies (M,) of their distributions, or None.

    Both are of softmax(logits / temperature), and float32 or wider; entropies are in nats.

    Args:
        lm: a Hugging Face model with an output layer.
        hidden: (M, D) the states before the tokens.
        targets: (M,) int64, the tokens.
    """

    def of_products(products: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """(c,) log-probabilities, and entropies if wanted, from the layer's products (c, V)."""
        all_logp = tempered_logits(lm.config, products, temperature).log_softmax(-1)
        logp = all_logp.gather(-1, tokens[:, None]).squeeze(-1)
        if not with_entropy:
            return (logp,)
        return logp, -(all_logp.exp() * all_logp).sum(-1)

    layer = lm.get_output_embeddings()
    found = InChunks.apply(hidden, layer.weight, layer.bias, targets, of_products)
    return found if with_entropy else (*found, None)


class InChunks(torch.autograd.Function):
    """A function of the output layer's products x @ w.T + b, computed chunk by chunk.

    The backward pass computes the products again. It adds up the gradients of w and b over the
    chunks in float32, and rounds them once, at the end. Autograd would round each chunk's gradient:
    in bfloat16 w's would be wrong by 1.4 % after 128 chunks.
    """

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, b: Tensor | None, targets: Tensor, of_products):
        """Apply of_products, (c, V) products and (c,) tokens -> tuple of (c,), to each chunk."""
        ctx.save_for_backward(x, w, b, targets)
        ctx.of_products = of_products
        parts = [
            of_products(product(states, w, b), tokens)
            for states, tokens in zip(x.split(CHUNK), targets.split(CHUNK))
        ]
        return tuple(map(torch.cat, zip(*parts)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor):
        """The gradients of x (M, D), w (V, D) and b (V,) from those of the results."""
        x, w, b, targets = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        of_x = torch.empty_like(x)
        of_w = torch.zeros_like(w, dtype=wide)
        of_b = None if b is None else torch.zeros_like(b, dtype=wide)
        for start in range(0, len(x), CHUNK):
            part = slice(start, start + CHUNK)
            products = product(x[part], w, b).requires_grad_()
            with torch.enable_grad():
                results = ctx.of_products(products, targets[part])
            (of_products,) = torch.autograd.grad(results, products, [g[part] for g in grads])
            of_products = of_products.to(x.dtype)  # as the gradient of any layer's result
            of_x[part] = of_products @ w
            of_w += wide_product(of_products.T, x[part])
            if b is not None:
                of_b += of_products.sum(0, dtype=wide)
        return of_x, of_w.to(w.dtype), None if b is None else of_b.to(b.dtype), None, None


def product(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """x @ w.T + b, (c, V), which in bfloat16 is float32."""
    products = wide_product(x, w.T)
    return products if b is None else products + b


def wide_product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y, which in bfloat16 is float32.

    On a GPU the operands are bfloat16, but the result is not rounded to bfloat16, which has 3
    digits: the sampler does the same (`rollout.prepare_config`), so that both agree.
    """
    if x.dtype != torch.bfloat16:
        return x @ y
    if x.is_cuda:
        return torch.mm(x, y, out_dtype=torch.float32)
    return x.float() @ y.float()  # products of two bfloat16 numbers are exact in float32


def tempered_logits(config, products: Tensor, temperature: float) -> Tensor:
    """The model's logits (c, V) from its output layer's products, divided by the temperature."""
    logits = products
    if (scale := logit_scale(config)) != 1.0:
        logits = logits * scale
    if softcap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
        logits = softcap * torch.tanh(logits / softcap)
    return logits if temperature == 1.0 else logits / temperature


def logit_scale(config) -> float:
    """The factor of the output layer's result: 1, except in Cohere, Granite and a few others.

    transformers multiplies by it outside of the output layer; configs have several names for it.
    """
    for name in ("logit_scale", "lm_head_multiplier"):
        if getattr(config, name, None):
            return getattr(config, name)
    scaling = getattr(config, "logits_scaling", None) or 1.0
    return scaling if config.model_type.startswith("hyperclovax") else 1 / scaling
