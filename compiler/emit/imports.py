"""Where step.py imports what a graph calls by its own name: no value is called so."""

IMPORTS = {
    "added_linear": "from surgery.compiler.kernels.added_linear import added_linear",
    "bernoulli": "from surgery.compiler.kernels.noise import bernoulli",
    "checkpoint": "from torch.utils.checkpoint import checkpoint",
    "document_starts": "from surgery.compiler.kernels.packed_attention import document_starts",
    "from_diagonals": "from surgery.compiler.kernels.diagonals import from_diagonals",
    "gaussian": "from surgery.compiler.kernels.noise import gaussian",
    "low_rank_linear": "from surgery.compiler.kernels.low_rank import low_rank_linear",
    "packed_attention": "from surgery.compiler.kernels.packed_attention import packed_attention",
    "quantized_linear": "from surgery.compiler.kernels.quantized_linear import quantized_linear",
    "rebuilt_linear": "from surgery.compiler.kernels.recompute import rebuilt_linear",
    "scaled_columns": "from surgery.compiler.kernels.scaled_columns import scaled_columns",
    "updated_row_norms": "from surgery.compiler.kernels.row_norms import updated_row_norms",
    "updated_weight": "from surgery.compiler.kernels.updated_weight import updated_weight",
}
