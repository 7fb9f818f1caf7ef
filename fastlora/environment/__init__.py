"""What fastlora finds where it is installed, and whether what it would run there computes what it should."""

from .facts import Environment, find_environment
from .selftest import Check, self_test

__all__ = ["Check", "Environment", "find_environment", "self_test"]
