"""Ours: adapting a driver, an identity loss, teaching E, growing, a recognition network, drawn heads."""
