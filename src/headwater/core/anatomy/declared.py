"""What has to be declared because a model's structure does not show it: one short line a family."""

ATTENTION_METHODS = {
    "GPTJAttention": "_attn",
    "CodeGenAttention": "_attn",
    "GPTNeoSelfAttention": "_attn",
}
"""Attention modules that do not go through transformers' attention interface -> the method that takes (q, k, v, mask)
and returns (out [B, H, T, K], weights [B, H, T, S])."""
