"""What the paper does not have: adaptation to a driver, likeness, teaching, growing, drawn heads."""
