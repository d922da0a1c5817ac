"""What `kvlib demo` shows: one evaluation, small enough to watch."""

RECIPES = (
    "full",
    "streaming_llm(sink=4, recent=508)",
    "h2o(budget=0.25)",
    "snapkv(budget=0.125, window=16)",
    "snapkv(budget=0.25, window=16)",
    "snapkv(budget=0.125, window=16, adaptive=True)",
    "duo_attention(sparsity=0.5)",
    "duo_attention(sparsity=0.5) + snapkv(budget=0.25, window=16)",
)
TASK = "niah"
DEPTHS = (0.05, 0.85)  # before the last tenth, which every recipe keeps
