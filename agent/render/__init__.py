"""Pictures for people, as SVG: pure, no library, the same bytes for the same content.

svg.py        elements and text, escaped
theme.py      colours of paper and of a dark screen
axes.py       round numbers and moments for ticks
content.py    what a picture of drift shows
histogram.py  bins of any width as an outline over even steps
drift.py      the picture of drift
forest.py     figures with their intervals, one under another
reliability.py, heatmap.py, curve.py   how certain, how confused, how it changes: for a page
png.py        SVG to PNG, where the library for it is installed
"""
