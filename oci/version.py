"""The version of Crito, told once."""

VERSION = "0.1.0"
