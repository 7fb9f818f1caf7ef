"""LoRA kernels: tensors in, tensors out; no autograd, no modules.

Three rooms hold the same functions under the same names and signatures:

- `reference`: eager torch for any dtype, the specification that the other two are held to;
- `cpu`: vectorised torch on oneDNN GEMMs, for machines without a GPU;
- `gpu`: Triton kernels and their launchers. Only this one imports triton.

Letters used throughout: M tokens, N out_features, K in_features, R rank.
"""
