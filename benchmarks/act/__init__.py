"""What actions do, beside baselines."""
