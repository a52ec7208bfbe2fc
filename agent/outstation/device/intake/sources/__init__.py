"""Sources that the daemon reads itself: each submits rows of one stream.

registry  config section → module    files       a watched folder          host    temperature, load, memory, disk
mqtt      topics of a site's broker  replay      recordings, at any speed  recordings  their file and order
exec      lines of a child process   program, program_launcher  that process
watched_folder  a folder by descriptor  file_marker  the file in hand at a death
"""
