"""Other people's models: one file a library, imported when a model of it is converted. None is a dependency.

Each says what ``nn.convert_attention`` needs: ``DROP_INS``, classes that single modules are exchanged for, and
``WHOLE_MODELS``, classes of models that are converted as a whole by ``convert_model`` and ``restore_model``.
"""
