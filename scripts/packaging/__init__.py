"""Packages of the program: wheel, sdist, Debian packages, apt repository, container image, bills of materials."""
