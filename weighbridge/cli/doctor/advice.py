"""What usually cures a kind of error; the message itself says where."""

from __future__ import annotations

from weighbridge.cli.exits import Failed


def advice(error: Exception) -> str:
    """What to do, in a few words; empty where the message is all there is to say."""
    from weighbridge.storage import errors

    match error:
        case Failed():
            return ""
        case errors.AccessDenied():
            return "check storage.s3.access_key and secret_key, and what their policy allows"
        case errors.BucketNotFound():
            return "create the bucket or folder, or correct storage.url"
        case errors.StorageFull():
            return "free space or raise the quota; waiting work goes on by itself"
        case errors.StorageUnavailable():
            return "check storage.s3.endpoint_url, and that the store runs"
        case ImportError():
            return "install the extra that the message names"
        case PermissionError():
            return "set WEIGHBRIDGE_TOKEN to a token that allows it (`weighbridge token create`)"
    return ""
