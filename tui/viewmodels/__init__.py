"""What the screens show, worked out without a screen: pure functions and plain state."""
