"""The machine that Duramen runs on."""
