@echo off
rem Start a worker on Windows; every option of `toolkit worker` works here as well.
rem
rem   scripts\start_worker.bat
rem   scripts\start_worker.bat --model vit_base_patch16_224
rem
rem No Redis server runs on Windows itself: name one that runs elsewhere first.
rem
rem   set REDIS_HOST=10.0.0.5
rem
rem It takes the toolkit of the active environment, else that of .venv beside this folder.
rem --pool solo: a pool of processes does not work on Windows; limits are kept all the same.
rem Ctrl-C stops the worker. docs/workers.md tells the rest.
setlocal
set "TOOLKIT=%~dp0..\.venv\Scripts\toolkit.exe"
where toolkit >nul 2>nul && set "TOOLKIT=toolkit"
if "%TOOLKIT%"=="toolkit" goto start
if exist "%TOOLKIT%" goto start
echo error: no toolkit in this environment; activate the one that has it>&2
exit /b 2
:start
"%TOOLKIT%" worker --pool solo %*
exit /b %ERRORLEVEL%
