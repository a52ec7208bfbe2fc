"""Notifications, Home Assistant and Sparkplug."""
