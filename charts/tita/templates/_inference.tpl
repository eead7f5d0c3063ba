{{- define "tita.inference.name" -}}
{{- printf "%s-inference" (include "tita.fullname" .) -}}
{{- end -}}

{{/* API keys of the inference server, for its clients. */}}
{{- define "tita.apiKeysEnv" -}}
{{- with .Values.inference.auth.existingSecret -}}
- name: TITA_API_KEYS
  valueFrom:
    secretKeyRef:
      name: {{ . | quote }}
      key: {{ $.Values.inference.auth.secretKey | quote }}
{{- end -}}
{{- end -}}

{{/* GPUs of a replica: one, or those that vLLM splits the models over. */}}
{{- define "tita.inference.gpus" -}}
{{- $inference := .Values.inference -}}
{{- $vllm := $inference.vllm -}}
{{- if not (kindIs "invalid" $inference.gpus) -}}
{{- int $inference.gpus -}}
{{- else if eq $inference.engine "vllm" -}}
{{- mul (int $vllm.tensorParallelSize) (int $vllm.pipelineParallelSize) -}}
{{- else -}}
1
{{- end -}}
{{- end -}}

{{/* Size of /dev/shm. vLLM's processes send each other data there: at most 160 MiB for each process and
direction, and NCCL's buffers. */}}
{{- define "tita.inference.shmSize" -}}
{{- if .Values.inference.shmSize -}}
{{- .Values.inference.shmSize -}}
{{- else if eq .Values.inference.engine "vllm" -}}
{{- printf "%dGi" (add 1 (max 1 (int (include "tita.inference.gpus" .)))) -}}
{{- else -}}
1Gi
{{- end -}}
{{- end -}}

{{/* Failed startup probes before a restart. */}}
{{- define "tita.inference.startupFailures" -}}
{{- default (ternary 720 360 (eq .Values.inference.engine "vllm")) .Values.inference.startupProbe.failureThreshold | int64 -}}
{{- end -}}

{{/* Arguments of `tita serve` that choose and configure the engine. */}}
{{- define "tita.inference.engineArgs" -}}
- --engine={{ .engine }}
{{- if eq .engine "vllm" }}
- --tensor-parallel-size={{ int64 .vllm.tensorParallelSize }}
- --pipeline-parallel-size={{ int64 .vllm.pipelineParallelSize }}
- --gpu-memory-utilization={{ .vllm.gpuMemoryUtilization }}
{{- with .vllm.maxModelLen }}
- --max-model-len={{ int64 . }}
{{- end }}
{{- if .vllm.enforceEager }}
- --enforce-eager
{{- end }}
{{- end }}
{{- end -}}

{{/* Environment variables of the inference server. */}}
{{- define "tita.inference.env" -}}
- name: TITA_GPUS
  value: {{ include "tita.inference.gpus" . | quote }}
{{ include "tita.storeEnv" . }}
{{ include "tita.commonEnv" . }}
{{- if not .Values.inference.cache.persistence.enabled }}
{{ include "tita.volumeGib" (dict "name" "TITA_CACHE_VOLUME_GIB" "volume" .Values.inference.cache) }}
{{- end }}
{{- if eq .Values.inference.engine "vllm" }}
# Compiled models and kernels, which a restarted container finds again.
- name: VLLM_CACHE_ROOT
  value: /cache/vllm
- name: TRITON_CACHE_DIR
  value: /cache/triton
{{- end }}
{{- end -}}

{{/* Volume source of the cache of downloaded models: a claim or the node's disk. */}}
{{- define "tita.inference.cacheVolume" -}}
{{- $cache := .Values.inference.cache -}}
{{- if $cache.persistence.enabled -}}
persistentVolumeClaim:
  claimName: {{ default (printf "%s-cache" (include "tita.inference.name" .)) $cache.persistence.existingClaim | quote }}
{{- else -}}
{{- include "tita.volumeSource" (dict "root" . "volume" $cache) -}}
{{- end -}}
{{- end -}}

{{/* Environment variables of the `helm test` pod. */}}
{{- define "tita.test.env" -}}
{{ include "tita.storeEnv" . }}
{{ include "tita.commonEnv" . }}
{{- if .Values.inference.enabled }}
- name: BASE_URL
  value: http://{{ include "tita.inference.name" . }}:{{ .Values.inference.service.port }}/v1
- name: MODEL
  value: {{ .Values.inference.modelName | quote }}
{{ include "tita.apiKeysEnv" . }}
{{- end }}
{{- end -}}
