# `mixer serve` on a CPU, as an ordinary user. The model is mounted at /model.onnx:
#   docker build --tag mixer-serve .
#   docker run --publish 127.0.0.1:8000:8000 --volume "$PWD/digits.onnx:/model.onnx:ro" mixer-serve
FROM python:3.13-slim
COPY . /source
RUN pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu \
    && pip install --no-cache-dir '/source[serve,export]' \
    && rm -r /source \
    && useradd --create-home mixer
USER mixer
WORKDIR /home/mixer
EXPOSE 8000
ENTRYPOINT ["mixer", "serve"]
CMD ["/model.onnx", "--host", "0.0.0.0", "--port", "8000"]
