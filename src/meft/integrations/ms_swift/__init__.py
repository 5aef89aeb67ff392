r"""The plug-in for ms-swift: registers the callback "meft", with the options in MEFT_OPTIONS.

Example:
    MEFT_OPTIONS='{"gamma": 0.03125}' swift sft --external_plugins $(python -m meft.integrations.ms_swift) \
        --callbacks meft ...
"""
