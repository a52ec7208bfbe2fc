"""Intake: rows and labels on their way into the store. An answer to a producer means that its rows are on the disk.

server        sockets, sources, commits            group_commit  rows of all producers, one transaction
connection    one producer on a socket             protocol      JSON lines to rows
labels        label lines to stored labels         source        protocol of a source
file_reader   tables in files to rows              media_reader  images and sounds to rows
decode_process  files of a stream, decoded in a confined child  decode_worker  that child
decoded_blocks  messages between the two
sources/      what the daemon reads itself
"""
