"""Kernel templates for x86 processors, shaped by vector width."""
