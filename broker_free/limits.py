"""Every bound of a node in one place, each with its reason. A limit that is hit is a typed error and a counter."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB
DAY_MS = 86_400_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of one node. Bytes, milliseconds and counts, as each name says."""

    body_bytes_max: int = MIB  # larger content blocks everything behind it on the same connection
    metadata_bytes_max: int = 16 * KIB
    pack_messages_max: int = 256  # one frame for the messages of one tick
    pack_bytes_max: int = 512 * KIB  # a pack stays well under the transport's frame limit
    outbox_messages_max: int = 10_000  # for each peer
    outbox_bytes_max: int = 256 * MIB  # for each peer
    outboxes_bytes_max: int = 1024 * MIB  # for all peers together, a body for several counted once
    recipients_max: int = 1_000  # of one publish
    peers_max: int = 1_024
    idle_sessions_max: int = (
        128  # beyond these the longest idle sessions end: half of what may be open stays free
    )
    session_idle_ms: int = 120_000  # none ends before this time
    interest_patterns_max: int = 1_000
    ttl_ms_default: int = 7 * DAY_MS
    ttl_ms_max: int = 14 * DAY_MS

    registry_entries_max: int = 100_000  # every node holds all of them in memory, tombstones included
    registry_bucket_keys_max: int = 50_000  # one application's mistake leaves room for the others
    registry_value_bytes_max: int = 16 * KIB  # it is settings and whereabouts, not content
    registry_name_chars_max: int = 255  # as a subject: a node id, a dot, and room for a name
    registry_frame_bytes_max: int = (
        16 * KIB
    )  # mail waits behind one such frame, which costs some 5 ms, at most
    registry_frame_entries_max: int = 1_000
    registry_sync_ms: int = 30_000  # compare with one peer so often: what no session's opening has shown
    registry_ahead_ms_max: int = DAY_MS  # a stamp further in the future is a broken clock, not a newer value
    tombstone_ms: int = 30 * DAY_MS  # a node that was away for longer takes over what the others have
    json_depth_max: int = 32  # of what peers send: deeper nesting serves nobody but an attacker
    sessions_max: int = 256  # open with peers at once; each holds a connection and a window of messages
    hellos_burst: int = 30  # greetings of one peer at once: each costs queries and answers
    hellos_a_second_max: int = 5  # and after that; an honest peer redials with growing pauses
    joins_of_a_key_max: int = 5  # tries with one invitation; an honest joiner needs one or two
    joins_burst: int = 20  # tries to join at this node at once, whatever the key
    joins_a_second_max: int = 1  # and after that
    invitations_max: int = 100  # open at once
    resolve_timeout_ms: int = 5_000  # for the address of a host name
    resolvers_max: int = 4  # host names looked up at once; each holds a thread
    unread_bytes_max: int = 64 * MIB  # sent on one connection without completing a message
    former_key_ms: int = 30 * DAY_MS  # a key that was replaced is kept for members that were away
    block_ms: int = 60_000  # how long a peer that sent without end stays out

    credit_messages: int = 256  # un-acked messages a peer may have on the wire
    credit_kib: int = 4 * KIB
    in_doubt_max: int = 256  # ids listed in a resync; more are sent again and recognised as duplicates
    deliveries_max: int = 10  # tries of one message by one consumer or effect; after them it is a dead letter
    backlog_messages_max: int = 10_000  # unsettled jobs: from here on peers must wait, until half is done
    ephemeral_pending_max: int = 10_000  # messages that are never stored, waiting for a loop that is behind
    slow_store_ms: int = 1_000  # a tick that took so long makes the peers wait as long again
    alarm_repeat_ms: int = 600_000  # the same alarm of the same peer is told once in this time

    tick_operations_max: int = 128  # group commit, never waiting for more; half a window: both ends work
    poll_frames_max: int = 1_024  # drained from the sockets in one tick
    marks_delay_ms: int = 50  # acks already seen are written with the next commit, at the latest after this

    dial_timeout_ms: int = 3_000  # a dropped SYN gives no event otherwise
    hello_timeout_ms: int = 5_000
    ack_silence_ms: int = 15_000  # no progress for so long: PING
    pong_timeout_ms: int = 5_000
    redial_ms_min: int = 250  # full jitter between these two
    redial_ms_max: int = 30_000

    heartbeat_ms: int = 2_000
    suspect_after_ms: int = 6_000
    down_after_ms: int = 15_000
    beat_members_max: int = 64  # larger meshes probe one member at a time: all-to-all beats cost n² messages
    probe_ack_ms: int = 600  # a ping without an answer for so long is tried through others
    probe_members: int = 3  # so many others
    lag_stretch_max: int = 8  # a node that was itself suspended stretches its time-outs up to this

    lease_ms: int = 30_000  # a consumer that hangs gives its job to another after this

    disk_free_bytes_min: int = 256 * MIB  # below that nothing new is accepted: others need the disk too
    ballast_bytes: int = 16 * MIB  # room for settling and pruning on a full disk: many times SQLite's log
    events_max: int = 10_000  # the newest that are kept
    check_ms_max: int = 5_000  # of the file, at a start after one that was not closed in order
    check_ms_max_clean: int = 250  # the same at every other start: it must stay under a second

    retained_ms: int = DAY_MS  # delivered messages kept for a peer whose store goes back in time
    retained_messages: int = 10_000

    blob_bytes_max: int = 1024 * MIB  # one large body; the format itself reaches 256 GiB
    blobs_bytes_max: int = 16 * 1024 * MIB  # all large bodies of a home, unfinished ones included
    blobs_max: int = 64  # named by one message: their ids must fit into its metadata
    blob_fetches_max: int = 256  # under way at once
    # asked of one peer and not yet on disk: all that ever lies in front of a letter
    blob_window_bytes: int = 256 * KIB
    blob_slice_bytes: int = 256 * KIB  # sent in one tick, after its mail
    blob_sync_bytes: int = 4 * MIB  # written between two syncs, so that the store's own never waits for more
    blob_answer_ms: int = 30_000  # a request without an answer is made again
    # after its last use; then dropped, unless a message in the outbox names it
    blob_retained_ms: int = 7 * DAY_MS
