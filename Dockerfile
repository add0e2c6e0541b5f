# docker build -t onetrain . && docker run --gpus all --ipc=host -v "$PWD/data:/onetrain/data" onetrain python train.py --help
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
WORKDIR /onetrain
COPY . .
RUN pip install --no-cache-dir -r requirements.txt
ENV OMP_WAIT_POLICY=passive
CMD ["python", "train.py", "--help"]
