"""Command `outstation doctor`: problems with their fixes, flash wear, power, and an archive for support."""
