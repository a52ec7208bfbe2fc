"""Rendering to SVG, HTML and PNG. Pure except `png`; equal content gives equal bytes."""
