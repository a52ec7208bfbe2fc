"""Rendering to SVG, HTML and PNG. Pure except `png`; equal content gives equal bytes.

svg           elements and text, escaped              charts        forest, curve, heatmap, reliability diagram
theme         colours, light and dark                 drift_model   content of a drift plot
axes          ticks at round numbers and times        drift_panels  panels of a drift plot
html          self-contained page                     drift_plot    the drift plot
png           SVG to PNG, with an optional library
"""
