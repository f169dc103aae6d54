"""Every localizing method, scored on models whose mechanism is known."""
