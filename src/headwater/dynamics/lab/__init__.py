"""The training lab: small transformers models from scratch, resumable to the bit, changed while they learn."""
