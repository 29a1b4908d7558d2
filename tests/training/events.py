"""What a TensorBoard file says, read as TensorBoard does: TFRecords of Event messages."""

import struct

from tensorboardX.proto.event_pb2 import Event


def scalars(folder):
    """[(tag, step, value)] of the only event file in a folder, in its order."""
    path, = folder.glob('events.out.tfevents.*')
    content, at, found = path.read_bytes(), 0, []
    while at < len(content):
        length, = struct.unpack_from('<Q', content, at)
        event = Event.FromString(content[at + 12:at + 12 + length])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        at += 12 + length + 4
    return found
