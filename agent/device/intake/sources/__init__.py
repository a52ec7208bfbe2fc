"""Sources a device runs itself, beside the socket: each makes rows for one stream.

files    a watched folder       host    this machine's temperature, load, memory, disk
replay   recordings, at speed    mqtt    what others publish on a broker of this site
"""
