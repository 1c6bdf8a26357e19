"""`weighbridge demo`: real digits, real training, eight drops of which five are trouble, two hosts asked at the end.

It uses Weighbridge as a stranger would: files in a bucket, the CLI's `up`, the Client, HTTP. Nothing else imports it.
"""
