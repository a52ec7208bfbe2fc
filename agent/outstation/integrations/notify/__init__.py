"""Notifications: tell people of alerts over webhook, mail, Apprise and a retained MQTT document.

Fleet and device use the same parts. A `Notifier` thread follows an `AlertSource`, plans in a durable queue what each
target is told, and one worker thread for each target sends it. Without [notify], nothing but the tables is imported.
"""
